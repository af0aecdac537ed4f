"""The configuration, packaged as `sia.conf`: one folder per group, one file per option."""

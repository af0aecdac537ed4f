"""The live page: a server over a folder of runs, and the child that a run may start.

FastAPI is imported by the server alone; `sia.web.child` needs none of it.
"""

"""Never ends."""

print("before the loop")
while True:
    pass

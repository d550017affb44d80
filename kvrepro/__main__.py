"""``python -m kvrepro`` is the command ``kvrepro``."""

from kvrepro.cli import main

if __name__ == "__main__":
    main()

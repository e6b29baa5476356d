"""`python -m k2mini`, which is what torchrun starts."""

from k2mini.cli import main

if __name__ == "__main__":
    main()

"""Entry point of ``python -m lars_train``, for torchrun."""

from lars_train.cli import main

if __name__ == "__main__":
    main()

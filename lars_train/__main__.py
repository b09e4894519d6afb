"""``python -m lars_train``, so that torchrun can start the program."""

from lars_train.cli import main

if __name__ == "__main__":
    main()

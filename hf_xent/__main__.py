"""`python -m hf_xent`: the command line, as `accelerate launch -m hf_xent sft ...` starts it in every process."""

from .cli import main

if __name__ == "__main__":  # not in the processes that it starts
    main()

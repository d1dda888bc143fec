"""One module per command of `python -m cluster`: `add_arguments(parser)` and `main(args)`."""

"""The operators, one a file. Backends never import each other; ctxenc.functional chooses between them."""

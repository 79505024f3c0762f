"""The graph passes, one a file; imported as `kvpass.passes`."""

if __name__ == "passes":
    raise ImportError("import kvpass.passes: this folder is part of the package kvpass, not a package of its own")

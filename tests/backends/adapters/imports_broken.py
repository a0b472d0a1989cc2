"""An adapter whose library is installed and cannot be loaded."""

raise OSError("libcudart.so.13: cannot open shared object file: No such file or directory")

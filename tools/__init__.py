"""Scripts that build the book; nothing in the package `mcnotes` needs them."""

"""One operation a file: the plain-torch reference, then the fast path, then the public function."""

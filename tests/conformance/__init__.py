"""Third-party suites, run direct and through the proxy: the list of passes must be the same.  See README.md."""

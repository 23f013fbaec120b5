"""What can be configured, and how it is read.

`schema` declares every option, `loader` reads file and environment, `docs` writes reference and sample file.
"""

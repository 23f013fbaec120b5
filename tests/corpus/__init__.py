"""Statements that passed through: those of PostgreSQL's regression suite, and what is made of them."""

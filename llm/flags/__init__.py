"""The command line of `llm`: arguments, parser, and what is refused before a file is opened."""

"""The laws of design.md §5: one suite over every method, backend and dtype."""

"""`make demo`: a real model from a registry package becomes packed 1-bit weights and a report card."""

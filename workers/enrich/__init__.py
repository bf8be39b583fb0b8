"""What is found out about a prompt beside generating: analysis, embedding, neighbours, the guard.

Light on purpose: the child processes import this package, and none of spaCy, torch or vLLM may be
loaded by it.
"""

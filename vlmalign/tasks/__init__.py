"""What is asked about an example, how the answer is written and how it is read. numpy and plain Python: no JAX."""

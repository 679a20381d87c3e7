"""What takes the place of a library that a machine may lack, put on the path by the benchmark that needs it."""

"""What a hostile visitor may send, row by row of the table of hostile inputs; `test_index.py` says where each is."""

"""What people look at: the HTML page, terminal tables, exports, and the comparison of two runs."""

"""What an experiment found: rows, tables, pictures, expectations, and the page that shows them."""

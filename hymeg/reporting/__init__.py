"""What a run leaves behind for reports, and the report made of it. No torch: a page is made anywhere, later."""

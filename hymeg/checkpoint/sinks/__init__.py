"""Where rows go: a sink plans its files to the byte, `transfer` fills them, `new_folder` lets them appear."""

"""How one program becomes many processes: a launcher each, beside the package, so that none is needed on one host."""

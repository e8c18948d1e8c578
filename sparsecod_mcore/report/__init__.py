"""Results for people: figures and tables made from the files that runs leave."""

"""What training measures: where it is kept, when, how it is reduced over ranks, and where it goes."""

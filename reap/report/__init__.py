"""Statistics and plans as figures and one page that people look at."""

"""Looking at models: scores, pictures, what a file holds, speed."""

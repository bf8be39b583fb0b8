"""What every part of promptmill agrees on: errors, names, jobs, tables. Imports nothing of ours."""

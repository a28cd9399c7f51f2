"""What came out of runs: answers, losses beside the teacher, tables, pages."""

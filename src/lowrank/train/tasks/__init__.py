"""What can be trained, a module for each task, and what several of them share."""

"""What a person sees of a study: progress, a watch of it, and what an edit of its file changes."""

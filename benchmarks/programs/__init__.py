"""Programs that run in a process of their own: peers, in their environments, and what has its memory measured."""

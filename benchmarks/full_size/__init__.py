"""A random model of full size through every streamed stage, measured beside what --dry-run said."""

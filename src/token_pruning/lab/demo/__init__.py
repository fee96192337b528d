"""The whole workflow on a task that any machine can build, sized to a few minutes."""

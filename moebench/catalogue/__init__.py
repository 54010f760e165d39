"""Describe the registered components: routers, layouts, tasks, losses."""

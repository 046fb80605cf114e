"""Small servers that tests start: a model hub, a proxy that breaks connections, a receiver of webhooks."""

"""The edge: maps one HTTP call to one method of the service and back. Knows HTTP, Connexion and nothing of
scheduling."""

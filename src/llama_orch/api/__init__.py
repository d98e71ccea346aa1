"""The edge: maps one HTTP call to one method of the service and back. Knows HTTP, Connexion and nothing of
scheduling."""

from llama_orch.api import lean_connexion as lean_connexion  # before anybody else imports Connexion

"""The only place with sockets: listener, relay, cancel, the link to the learner, drain."""

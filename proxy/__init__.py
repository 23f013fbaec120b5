"""The proxy: between PostgreSQL's clients and the server, byte for byte, but for what vector queries get.

Pure, bytes in and bytes out:

wire       messages and framing
sql        what a statement's text says
interface  functions and settings of the proxy's own
session    one client's protocol state, and what is put in force
auth       SCRAM on both sides

With sockets and processes:

net        a worker: connections, relay, limits
admin      dashboard, metrics, health
supervisor, children, succession   the processes of one proxy, and how others take their place
configuration, relay_only          what a running proxy is told
main, status, top, patterns        the command line
"""

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
supervisor, child, children, succession   the processes of one proxy, and how others take their place
sockets, reachability                     what they listen on, and whether the servers answer
configuration, relay_only                 what a running proxy is told
logs, version                             what it says
main, status, top, patterns, explaining   the command line, and docs, which writes its page
"""

"""The same raw messages to the server directly and through the proxy: the replies must not differ.

notation      scripts of messages and instructions as text, one a line
conversation  plays a script on one connection and writes down what the client saw
comparison    plays it directly and through the proxy, tells the difference, shrinks a script that differs
generator     random scripts from a seed
churn         connections that end in any state, by any way
world         the server, the database and the proxies that scripts run against
scripts/      what the protocol demands, one subject a file
regressions/  scripts that once differed
"""

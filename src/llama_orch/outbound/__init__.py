"""The one door for every request that the service makes to elsewhere (HP-SEC-4).

`door.Outbound` judges, pins and requests; `plugins` lets others judge; nothing else in the service opens a connection
to another machine. Two things keep it so: an import contract, and that every limit is set here.
"""

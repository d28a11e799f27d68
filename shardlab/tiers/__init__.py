"""Where bytes live: memory, and files on a disk."""

from shardlab.tiers.disk import Disk
from shardlab.tiers.disk_failures import FileSpec
from shardlab.tiers.disk_tickets import ReadTicket, RecordRequest, WriteTicket
from shardlab.tiers.memory import allocate
from shardlab.tiers.record_file import RecordFile
from shardlab.tiers.record_log import LogSpec, RecordLog

__all__ = ["Disk", "FileSpec", "LogSpec", "ReadTicket", "RecordFile", "RecordLog", "RecordRequest",
           "WriteTicket", "allocate"]

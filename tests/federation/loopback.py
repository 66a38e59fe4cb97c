"""A Flower Grid whose nodes are ClientApps in this process; what they exchange goes through bytes."""

import itertools

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message import make_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


class Loopback(Grid):
    """Nodes answer when the replies are asked for.

    Args:
      apps: {node id: (ClientApp, configuration of the node)}; nodes may come and go.
      meddle: `meddle(node, message, reply) -> reply or None`: what becomes of a reply.
    """

    def __init__(self, apps: dict, meddle=None):
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.apps, self.meddle = apps, meddle or (lambda node, message, reply: reply)
        self.sent, self.numbers, self.log = {}, itertools.count(1), []

    run = None

    def set_run(self, run):
        raise NotImplementedError

    def create_message(self, *_, **__):
        raise NotImplementedError

    def send_and_receive(self, *_, **__):
        raise NotImplementedError

    def get_node_ids(self):
        return [*self.apps]

    def push_messages(self, messages):
        ids = []
        for message in messages:
            name = f"message {next(self.numbers)}"
            message.metadata.__dict__["_message_id"] = name
            self.sent[name] = through_bytes(message)
            ids.append(name)
        return ids

    def pull_messages(self, message_ids):
        replies = []
        for name in [name for name in message_ids if name in self.sent]:
            message = self.sent.pop(name)
            node = message.metadata.dst_node_id
            self.log.append((node, message.metadata.message_type, message))
            if node in self.apps:
                app, config = self.apps[node]
                context = Context(1, node, config, RecordDict(), {})
                reply = self.meddle(node, message, app(message, context))
            else:
                reply = Message(Error(5, "node unavailable"), reply_to=message)
            if reply is not None:
                replies.append(through_bytes(reply))
        return replies


def through_bytes(message: Message) -> Message:
    """What arrives of a message."""
    proto = ProtoMessage.FromString(message_to_proto(message).SerializeToString())
    there = message_from_proto(proto)
    metadata = message.metadata
    if there.has_error():
        return make_message(metadata=metadata, error=there.error)
    return make_message(metadata=metadata, content=there.content)

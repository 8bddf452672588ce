"""What one thread puts in comes out on the event loop, in order."""

import asyncio
import threading

from twla_jax.serving.mailbox import Mailbox


def test_letters_of_a_thread_come_in_order_and_wake_the_loop_once_if_they_come_together():
    async def run():
        loop = asyncio.get_running_loop()
        woken = []
        wake = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *call: woken.append(call) or wake(*call)
        mailbox, queues = Mailbox(loop), [asyncio.Queue() for _ in range(3)]

        def write(count):
            for number in range(count):
                mailbox.put(queues[number % 3], number)

        thread = threading.Thread(target=write, args=(300,))
        thread.start()
        thread.join()  # the loop does not run meanwhile
        found = [[await queue.get() for _ in range(100)] for queue in queues]
        once = len(woken)
        thread = threading.Thread(target=write, args=(3000,))
        thread.start()
        again = [[await queue.get() for _ in range(1000)] for queue in queues]
        return once, found, again

    once, found, again = asyncio.run(run())
    assert once == 1
    assert found == [list(range(first, 300, 3)) for first in range(3)]
    assert again == [list(range(first, 3000, 3)) for first in range(3)]


def test_what_comes_after_the_loop_is_closed_is_dropped():
    loop = asyncio.new_event_loop()
    mailbox, queue = Mailbox(loop), asyncio.Queue()
    loop.close()
    mailbox.put(queue, 1)
    assert queue.empty()

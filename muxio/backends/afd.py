"""AFD polls on an I/O completion port, Windows.

What select(), WSAPoll() and the event objects of Winsock are made of is one request to the kernel's Ancillary Function
Driver: "complete this when one of these things is true of that socket". It is not documented, but it is the same since
Windows Vista, and wepoll, libuv, mio and trio stand on it. Facts in here are theirs, or were seen on Wine 8.0 [seen].

- A request is about a moment: when it completes, somebody has to ask again. So a socket that has fired is asked for
  anew at the next wait, and one that is not ready costs a wait nothing.
- One request a socket at a time: two confuse Windows (wepoll, README). Who wants to know something else cancels first.
- A request's memory is the kernel's until its completion was taken from the port, cancelled or not [seen: freeing it
  earlier crashes].
- Requests go through handles of the driver, not of sockets. To cancel one costs time in proportion to the requests on
  its handle, so a handle serves a few dozen sockets (wepoll, polling).
"""

from __future__ import annotations

import sys

if sys.platform != "win32":
    raise ImportError("AFD is a facility of Windows")

import ctypes
import errno
import math
import threading
from ctypes import byref, c_int32, c_size_t, c_uint16, c_uint32, c_void_p, c_wchar_p, sizeof

from muxio.backends.facility import INVALID, Facility, refuse_files
from muxio.events import ERROR, HANGUP, INTEREST, ONESHOT, PRIORITY, READ, READ_CLOSED, WRITE, combinations

IOCTL_AFD_POLL = 0x00012024

# What a request asks for, and what it is answered with.
RECEIVE, RECEIVE_EXPEDITED, SEND, DISCONNECT = 0x1, 0x2, 0x4, 0x8
ABORT, LOCAL_CLOSE, ACCEPT, CONNECT_FAIL = 0x10, 0x20, 0x80, 0x100

#: What is asked for in any case: that the connection was reset, was never made, and that the socket was closed here.
_ALWAYS = ABORT | LOCAL_CLOSE | CONNECT_FAIL

#: Interest -> what is asked for; and what each answer means.
_ASKS = {READ: RECEIVE | ACCEPT | DISCONNECT, WRITE: SEND, PRIORITY: RECEIVE_EXPEDITED}
_MEANS = {
    RECEIVE: READ,
    ACCEPT: READ,
    DISCONNECT: READ | READ_CLOSED,
    SEND: WRITE,
    RECEIVE_EXPEDITED: PRIORITY,
    ABORT: ERROR | HANGUP,
    CONNECT_FAIL: WRITE | ERROR,
    LOCAL_CLOSE: INVALID,
}

#: How many sockets share a handle of the driver.
_SHARE = 32

#: How many completions one call takes.
_BATCH = 256

#: Seconds that the main thread waits at most before it lets Python look for signals. Ctrl-C arrives in a thread of its
#: own there, and nothing that a poller may claim for itself ends a GetQueuedCompletionStatusEx: the event that Python
#: sets is not an alert, and `signal.set_wakeup_fd` is the program's.
_SIGNALS = 0.05

#: Milliseconds for a completion that is certain to come, and to come soon.
_CERTAIN = 100

#: Tells a wake-up from the driver's completions.
_WAKE_KEY = 1

_SIO_BASE_HANDLE = 0x48000022
_SIO_BSP_HANDLE_POLL = 0x4800001D
_SOL_SOCKET, _SO_TYPE = 0xFFFF, 0x1008

_STATUS_PENDING = 0x103
_STATUS_CANCELLED = 0xC0000120
_WAIT_TIMEOUT = 258
_FOREVER = 0xFFFFFFFF


class _UnicodeString(ctypes.Structure):
    _fields_ = (("length", c_uint16), ("capacity", c_uint16), ("buffer", c_wchar_p))


class _ObjectAttributes(ctypes.Structure):
    _fields_ = (
        ("length", c_uint32),
        ("directory", c_void_p),
        ("name", ctypes.POINTER(_UnicodeString)),
        ("attributes", c_uint32),
        ("descriptor", c_void_p),
        ("quality", c_void_p),
    )


class _IoStatus(ctypes.Structure):
    _fields_ = (("status", c_size_t), ("information", c_size_t))


class _PollInfo(ctypes.Structure):
    """AFD_POLL_INFO, for one socket."""

    _fields_ = (
        ("timeout", ctypes.c_int64),
        ("count", c_uint32),
        ("exclusive", c_uint32),
        ("socket", c_void_p),
        ("events", c_uint32),
        ("status", c_int32),
    )


class _Completion(ctypes.Structure):
    """OVERLAPPED_ENTRY."""

    _fields_ = (("key", c_size_t), ("request", c_size_t), ("internal", c_size_t), ("transferred", c_uint32))


_kernel = ctypes.WinDLL("kernel32", use_last_error=True)
_winsock = ctypes.WinDLL("ws2_32", use_last_error=True)
_ntdll = ctypes.WinDLL("ntdll")

_create_port = _kernel.CreateIoCompletionPort
_create_port.argtypes, _create_port.restype = (c_void_p, c_void_p, c_size_t, c_uint32), c_void_p
_take = _kernel.GetQueuedCompletionStatusEx
_take.argtypes = (c_void_p, ctypes.POINTER(_Completion), c_uint32, ctypes.POINTER(c_uint32), c_uint32, c_int32)
_post = _kernel.PostQueuedCompletionStatus
_post.argtypes = (c_void_p, c_uint32, c_size_t, c_void_p)
_close_handle = _kernel.CloseHandle
_close_handle.argtypes = (c_void_p,)
_set_modes = _kernel.SetFileCompletionNotificationModes
_set_modes.argtypes = (c_void_p, ctypes.c_uint8)
_create_file = _ntdll.NtCreateFile
_create_file.argtypes = (
    *(c_void_p, c_uint32, c_void_p, c_void_p, c_void_p),
    *(c_uint32, c_uint32, c_uint32, c_uint32, c_void_p, c_uint32),
)
_control = _ntdll.NtDeviceIoControlFile
_control.argtypes = (*(c_void_p,) * 3, c_size_t, c_void_p, c_uint32, c_void_p, c_uint32, c_void_p, c_uint32)
_cancel = _ntdll.NtCancelIoFileEx
_cancel.argtypes = (c_void_p, c_void_p, c_void_p)
_ioctl = _winsock.WSAIoctl
_ioctl.argtypes = (*(c_size_t, c_uint32, c_void_p, c_uint32, c_void_p, c_uint32), *(c_void_p,) * 3)
_getsockopt = _winsock.getsockopt  # Wine's ioctl takes every number for a socket [seen]
_getsockopt.argtypes = (c_size_t, c_int32, c_int32, c_void_p, c_void_p)
for _function in (_create_file, _control, _cancel):
    _function.restype = c_uint32

#: Requests whose port was closed before the kernel gave their memory back.
_kept: list[_Request] = []


class _Request:
    """One request to the driver, with the memory that is the kernel's while it is on its way."""

    __slots__ = ("handle", "info", "status", "watch")

    def __init__(self, watch: _Watch) -> None:
        self.watch = watch
        self.handle = watch.driver.handle
        self.status = _IoStatus()
        self.info = _PollInfo()

    def cancel(self) -> None:
        """Let it complete. If it has already, or does so just now, that is the same."""
        _cancel(self.handle, byref(self.status), byref(_IoStatus()))


class _Driver:
    """A handle of the driver, for some sockets."""

    __slots__ = ("handle", "sockets")

    def __init__(self, port: int) -> None:
        text = "\\Device\\Afd\\muxio"
        name = _UnicodeString(2 * len(text), 2 * len(text), text)
        attributes = _ObjectAttributes(sizeof(_ObjectAttributes), None, ctypes.pointer(name), 0, None, None)
        handle = c_void_p()
        # SYNCHRONIZE; shared for reading and writing; it is there already (FILE_OPEN).
        status = _create_file(
            byref(handle), 0x00100000, byref(attributes), byref(_IoStatus()), None, 0, 3, 1, 0, None, 0
        )
        if status:
            raise OSError(errno.ENODEV, f"the driver of Windows' sockets cannot be opened: NTSTATUS {status:#x}")
        self.handle = handle.value or 0
        self.sockets = 0
        if not _create_port(self.handle, port, 0, 0):
            error = ctypes.WinError(ctypes.get_last_error())
            self.close()
            raise error
        _set_modes(self.handle, 2)  # no event for each completion (FILE_SKIP_SET_EVENT_ON_HANDLE): a saving

    def close(self) -> None:
        _close_handle(self.handle)


class _Watch:
    """A registration: what it asks for, and the request that is on its way.

    An object a registration, so that what comes late for an old owner of a number never reaches its new one.
    """

    __slots__ = ("asks", "base", "driver", "fd", "mask", "request", "spare")

    def __init__(self, fd: int, base: int, driver: _Driver) -> None:
        self.fd = fd
        self.base = base
        self.driver = driver
        self.mask = 0
        self.asks = 0  #: 0: disarmed
        self.request: _Request | None = None
        self.spare: _Request | None = None  #: the last one, whose memory is ours again


class Backend(Facility):
    name = "afd"
    masks = combinations(INTEREST | ONESHOT)
    sees_changes = False  # requests are made by the one who waits
    wake_fd = -1  # no socket has this number

    __slots__ = (
        "_changing",
        "_completions",
        "_drivers",
        "_due",
        "_invalid",
        "_lock",
        "_number",
        "_on_way",
        "_port",
        "_watched",
        "_woken",
    )

    def __init__(self) -> None:
        port = _create_port(c_void_p(-1), None, 0, 1)
        if not port:
            raise ctypes.WinError(ctypes.get_last_error())
        self._port: int = port
        try:
            # Before sockets come and go: one that takes the number of a closed socket confuses Wine's server [seen].
            self._drivers = [_Driver(port)]
        except BaseException:
            _close_handle(port)
            raise
        self._completions = (_Completion * _BATCH)()
        self._lock = threading.RLock()  # not held while waiting
        self._watched: dict[int, _Watch] = {}
        #: Those for whom there is to be a request, and is none or the wrong one.
        self._due: dict[_Watch, None] = {}
        #: Requests that were cancelled so that another can be made.
        self._changing: dict[_Request, None] = {}
        #: Requests by their numbers, which come back with their completions.
        self._on_way: dict[int, _Request] = {}
        self._number = 0
        #: Numbers that were found to be no sockets any more.
        self._invalid: list[int] = []
        self._woken = False

    def add(self, fd: int, mask: int) -> None:
        base = _base_handle(fd)
        with self._lock:
            driver = next((driver for driver in self._drivers if driver.sockets < _SHARE), None)
            if driver is None:
                driver = _Driver(self._port)
                self._drivers.insert(0, driver)
            driver.sockets += 1
            watch = self._watched[fd] = _Watch(fd, base, driver)
            self._ask(watch, mask)

    def modify(self, fd: int, mask: int) -> None:
        base = _base_handle(fd)
        with self._lock:
            watch = self._watched[fd]
            watch.base = base
            self._ask(watch, mask)

    def remove(self, fd: int) -> None:
        with self._lock:
            watch = self._watched.pop(fd, None)
            if watch is not None:
                self._forget(watch)
                watch.driver.sockets -= 1

    def disarm(self, fd: int, mask: int) -> None:
        with self._lock:
            watch = self._watched.get(fd)
            if watch is not None:
                self._forget(watch)

    def wait(self, timeout: float | None, max_events: int) -> list[tuple[int, int]]:
        if threading.current_thread() is threading.main_thread():
            timeout = _SIGNALS if timeout is None else min(timeout, _SIGNALS)
        milliseconds = _FOREVER if timeout is None else math.ceil(timeout * 1000)
        ready: list[tuple[int, int]] = []
        with self._lock:
            # What has completed while nobody waited may be over by now (somebody has received what had come), so it is
            # asked for again: the others would not report it either. Before those who were reported last: in turn.
            before, self._due = self._due, {}
            self._collect(0, _BATCH, ready)
            self._due.update(before)
            self._invalid += [fd for fd, events in ready if events & INVALID]
            ready = [pair for pair in ready if pair[0] == self.wake_fd]
        while True:
            with self._lock:
                certain = self._request_all() or bool(self._changing)
                ready += [(fd, INVALID) for fd in self._invalid[:max_events]]
                del self._invalid[:max_events]
            if len(ready) >= max_events:
                return ready
            patience = 0 if ready else milliseconds
            if certain:
                patience = max(patience, _CERTAIN)
            took = self._collect(patience, min(_BATCH, max_events - len(ready)), ready)
            # If nothing came of it, it was of those who are gone, or made room for other requests: a look has not seen
            # everything yet.
            if ready or not took or timeout != 0:
                return ready

    def wake(self) -> None:
        if not self._woken:
            self._woken = True
            _post(self._port, 0, _WAKE_KEY, None)

    def drain(self) -> None:
        self._woken = False  # the completion was taken by `wait`

    def close(self) -> None:
        with self._lock:
            for request in self._on_way.values():
                request.cancel()
            count = c_uint32()
            while self._on_way and _take(self._port, self._completions, _BATCH, byref(count), 1000, False):
                for completion in self._completions[: count.value]:
                    self._on_way.pop(completion.request, None)
            _kept.extend(self._on_way.values())
            for driver in self._drivers:
                driver.close()
            _close_handle(self._port)

    # Inside

    def _collect(self, patience: int, most: int, ready: list[tuple[int, int]]) -> bool:
        """Take completions from the port, for as many milliseconds, and add what they tell. Whether there were any."""
        count = c_uint32()
        if not _take(self._port, self._completions, most, byref(count), patience, False):
            number = ctypes.get_last_error()
            if number != _WAIT_TIMEOUT:
                raise ctypes.WinError(number)
            return False
        for completion in self._completions[: count.value]:
            if completion.key == _WAKE_KEY:
                ready.append((self.wake_fd, READ))
            else:
                self._complete(completion.request, ready)
        return True

    # These under the lock

    def _ask(self, watch: _Watch, mask: int) -> None:
        """Let there be a request for what is asked for now."""
        watch.mask = mask
        watch.asks = _ALWAYS
        for bit, asks in _ASKS.items():
            if mask & bit:
                watch.asks |= asks
        if watch.request is None:
            self._due[watch] = None
        elif watch.request.info.events != watch.asks:
            self._changing[watch.request] = None
            watch.request.cancel()  # its completion makes room for another

    def _forget(self, watch: _Watch) -> None:
        watch.asks = 0
        self._due.pop(watch, None)
        if watch.request is not None:
            watch.request.cancel()

    def _request_all(self) -> bool:
        """Make the requests that are due. Whether one was complete at once."""
        due, self._due = self._due, {}
        complete = False
        for watch in due:
            request = watch.spare or _Request(watch)
            info = request.info
            info.timeout, info.count, info.exclusive = 0x7FFFFFFFFFFFFFFF, 1, 0
            info.socket, info.events, info.status = watch.base, watch.asks, 0
            request.status.status = _STATUS_PENDING
            self._number += 1
            self._on_way[self._number] = watch.request = request
            watch.spare = None
            size = sizeof(_PollInfo)
            status = _control(
                *(request.handle, None, None, self._number, byref(request.status)),
                *(IOCTL_AFD_POLL, byref(info), size, byref(info), size),
            )
            complete |= status == 0  # its completion is in the port all the same, or about to be
            if status not in (0, _STATUS_PENDING):  # closed; there will be no completion
                del self._on_way[self._number]
                watch.request, watch.asks = None, 0
                self._invalid.append(watch.fd)
        return complete

    def _complete(self, number: int, ready: list[tuple[int, int]]) -> None:
        """A request is over: tell of it, and let there be another."""
        with self._lock:
            self._settle(self._on_way.pop(number), ready)

    def _settle(self, request: _Request, ready: list[tuple[int, int]]) -> None:
        self._changing.pop(request, None)
        watch = request.watch
        if watch.request is request:
            watch.request, watch.spare = None, request
        if not watch.asks or self._watched.get(watch.fd) is not watch:
            return
        events = 0
        if request.status.status & 0xFFFFFFFF == 0 and request.info.count:
            for bit, means in _MEANS.items():
                if request.info.events & bit & watch.asks:
                    events |= means
        if events & INVALID:
            watch.asks = 0
        else:
            self._due[watch] = None
        if events:
            ready.append((watch.fd, events))


def _base_handle(fd: int) -> int:
    """The handle that the driver knows a socket by, beneath whatever stands above it (a firewall, an antivirus).

    OSError: EBADF for what is closed. PermissionError: a file.
    """
    kind, base, size = c_int32(), c_void_p(), c_uint32(4)
    if _getsockopt(fd, _SOL_SOCKET, _SO_TYPE, byref(kind), byref(size)):
        refuse_files(fd)
        raise OSError(errno.EBADF, f"{fd} is no socket, or was closed")
    for code in (_SIO_BASE_HANDLE, _SIO_BSP_HANDLE_POLL):
        if _ioctl(fd, code, None, 0, byref(base), sizeof(base), byref(size), None, None) == 0:
            return base.value or 0
    raise ctypes.WinError(ctypes.get_last_error())

"""AFD polls at an I/O completion port: what Windows' own select() is made of, without its limits.

``\\Device\\Afd`` is the driver below Winsock. A handle to it takes IOCTL_AFD_POLL, an operation that ends as soon as
one of the events asked for holds for a socket, and then stands in the queue of the completion port that the handle
belongs to. None of this is documented by Microsoft, and all of it has been the same since Windows Vista: wepoll, libuv,
mio, polling and trio live on it. Where a fact is one of theirs, it says so here; [seen] is what was seen on Wine 8.0.

Four rules follow from how the driver behaves, and the rest of this file from them.

- One operation a socket: with two at a time, one may end for the events of the other (trio, "_io_windows.py"), or never
  (wepoll#35; of two ports as well, so a socket is for one poller at a time). So changes are collected, and what is new
  at the next wait is what the kernel is told.
- The memory of an operation is the kernel's until its completion was taken out of the queue, cancelled or not; freed
  earlier, it crashes the process [seen]. So all that are under way stand in a table, and nothing but a completion takes
  them out.
- An operation ends once: what holds for longer is seen by beginning another. That is level-triggered, and costs as much
  as is ready, not as is registered. What ended while nobody waited is no more than a hint, since it may have been read
  meanwhile: it begins anew before anything is said of it.
- Sockets are numbers that are used again. Each registration is an object of its own, and an operation belongs to that,
  not to the number: what an operation of an earlier owner comes to is thrown away.
"""

from __future__ import annotations

import sys

if sys.platform != "win32":
    raise ImportError("AFD is a facility of Windows")

import ctypes
import errno
import math
import time
import warnings
import weakref
from collections.abc import Callable
from ctypes import byref, c_int, c_int64, c_size_t, c_ubyte, c_ulong, c_ushort, c_void_p, c_wchar_p

from muxio.backends.facility import INVALID, Facility, until_signals
from muxio.events import ERROR, HANGUP, INTEREST, ONESHOT, PRIORITY, READ, READ_CLOSED, WRITE, combinations

#: AFD_POLL_*: the numbers of wepoll's src/afd.h. Left out is 0x40, CONNECT: true for as long as a socket is connected.
_RECEIVE = 0x1
_RECEIVE_EXPEDITED = 0x2
_SEND = 0x4
_DISCONNECT = 0x8
_ABORT = 0x10
_LOCAL_CLOSE = 0x20
_ACCEPT = 0x80
_CONNECT_FAIL = 0x100

#: What is asked for in any case, since it is reported without interest as well.
_ALWAYS = _ABORT | _LOCAL_CLOSE | _CONNECT_FAIL

#: Interest -> what is asked for. DISCONNECT, the peer's end, goes with READ: for who does not read it would hold for
#: ever.
_ASKS = {READ: _RECEIVE | _ACCEPT | _DISCONNECT, WRITE: _SEND, PRIORITY: _RECEIVE_EXPEDITED}

#: What each answer is called here. ABORT comes with a reset, but with two half-closes too, so it is a hang-up and not
#: for sure an error (wepoll has it so).
_MEANS = {
    _RECEIVE: READ,
    _ACCEPT: READ,
    _RECEIVE_EXPEDITED: PRIORITY,
    _SEND: WRITE,
    _DISCONNECT: READ | READ_CLOSED,
    _ABORT: HANGUP,
    _CONNECT_FAIL: WRITE | ERROR,
}


def _translation(word: int, dictionary: dict[int, int]) -> int:
    meaning = 0
    for bit, meant in dictionary.items():
        if word & bit:
            meaning |= meant
    return meaning


_MASKS = {events: _ALWAYS | _translation(events, _ASKS) for events in combinations(INTEREST | ONESHOT)}

#: The meaning of all answers that may come together.
_BITS = [_translation(answer, _MEANS) for answer in range(_CONNECT_FAIL << 1)]

_IOCTL_AFD_POLL = 0x00012024
_FOR_EVER = 2**63 - 1  # AFD_POLL_INFO.Timeout

# NTSTATUS, [MS-ERREF] 2.3.1
_SUCCESS = 0
_PENDING = 0x103
_CANCELLED = 0xC0000120
#: What an operation is refused with when its socket was closed: the number is nobody's, or of something else by now.
_CLOSED = {0xC0000008, 0xC0000024}  # STATUS_INVALID_HANDLE, STATUS_OBJECT_TYPE_MISMATCH

# mswsock.h. What a layered provider (LSP) has put over a socket, AFD does not know; these lead to what is below.
_SIO_BASE_HANDLE = 0x48000022
_SIO_BSP_HANDLE_SELECT = 0x4800001C
_SIO_BSP_HANDLE_POLL = 0x4800001D

_SOL_SOCKET = 0xFFFF
_SO_TYPE = 0x1008

_WSAENOTSOCK = 10038
_WAIT_TIMEOUT = 258
_INFINITE = 0xFFFFFFFF

#: Sockets that share a handle to the driver. Cancelling an operation takes longer the more there are on its handle:
#: with 1,000 one begins to feel it (trio). wepoll and mio have 32 as well.
_GROUP = 32

#: Completions that one call takes out of the queue.
_BATCH = 1024

#: How many seconds `close` gives the kernel to return the memory of cancelled operations. It does so at once [seen].
_PATIENCE = 1.0


class _Operation(ctypes.Structure):
    """The memory of one IOCTL_AFD_POLL: an IO_STATUS_BLOCK, and an AFD_POLL_INFO for one socket."""

    _fields_ = (
        ("status", c_size_t),  # a union with a pointer, of which NTSTATUS is the lower half
        ("information", c_size_t),
        ("timeout", c_int64),
        ("count", c_ulong),
        ("exclusive", c_ulong),
        ("handle", c_size_t),
        ("events", c_ulong),
        ("event_status", c_ulong),
    )

    status: int
    handle: int
    events: int

    #: The registration that it belongs to, and where it lies.
    registration: _Registration
    address: int
    #: The name under which it is under way, and what it was begun for; 0 if it is not.
    name: int
    asked: int

    @classmethod
    def of(cls, registration: _Registration) -> _Operation:
        operation = cls(timeout=_FOR_EVER, handle=registration.base)
        operation.registration = registration
        operation.address = ctypes.addressof(operation)
        operation.name = operation.asked = 0
        return operation

    def says_closed(self) -> bool:
        return bool(self.status & 0xFFFFFFFF == _SUCCESS and self.events & _LOCAL_CLOSE)


_INFO: int = _Operation.timeout.offset
_INFO_SIZE = ctypes.sizeof(_Operation) - _INFO


class _Group:
    """A handle to the driver, and for how many more sockets it is good."""

    __slots__ = ("handle", "room")

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.room = _GROUP


class _Registration:
    """A socket from `add` to `remove`. wanted: what AFD is to be asked for, 0 for nothing."""

    __slots__ = ("base", "closed", "fd", "group", "operation", "wanted")

    def __init__(self, fd: int, base: int, wanted: int, group: _Group) -> None:
        self.fd = fd
        self.base = base
        self.wanted = wanted
        self.group = group
        self.closed = False  # the socket was, and its number may be somebody else's
        self.operation: _Operation | None = None


class _Port:
    """The completion port, the handles to the driver, and the operations under way: what has to be given back."""

    __slots__ = ("_closing", "_count", "_entries", "_last", "groups", "handle", "operations")

    def __init__(self) -> None:
        self.handle = _checked(_CreateIoCompletionPort(_INVALID_HANDLE, None, 0, 0))
        self.groups: list[_Group] = []
        #: Name -> the operation under way. Names, unlike addresses, are not used again.
        self.operations: dict[int, _Operation] = {}
        self._last = 0
        self._closing = False
        # Completions, OVERLAPPED_ENTRYs of four words each, of which the second is the name; and how many have been
        # taken and not yet looked at. Should an exception strike just when the kernel has handed them out, they are
        # still here.
        self._entries = (c_size_t * (4 * _BATCH))()
        self._count = c_ulong(0)

    def open_group(self) -> _Group:
        handle = _open_driver()
        try:
            _checked(_CreateIoCompletionPort(handle, self.handle, 0, 0))
        except OSError:
            _CloseHandle(handle)
            raise
        # No event is set for each completion as well (FILE_SKIP_SET_EVENT_ON_HANDLE): a saving, and no more.
        _SetFileCompletionNotificationModes(handle, 2)
        group = _Group(handle)
        self.groups.append(group)
        return group

    def begin(self, operation: _Operation, asked: int) -> int:
        """Returns an NTSTATUS. With success, too, a completion comes: what holds already ends at once [seen]."""
        if self._closing:  # at the end of the process, while a daemon thread still waits
            return _PENDING
        operation.count = 1
        operation.events = operation.asked = asked
        self._last += 1
        name = operation.name = self._last
        self.operations[name] = operation
        address = operation.address
        info = address + _INFO
        status: int = _NtDeviceIoControlFile(
            *(operation.registration.group.handle, None, None, name, address),
            *(_IOCTL_AFD_POLL, info, _INFO_SIZE, info, _INFO_SIZE),
        )
        if status not in (_SUCCESS, _PENDING):
            self.end(operation)
        return status

    def end(self, operation: _Operation) -> None:
        self.operations.pop(operation.name, None)
        operation.asked = 0

    def cancel(self, operation: _Operation) -> None:
        """It ends soon, and may have ended just now: either way a completion returns its memory."""
        _NtCancelIoFileEx(operation.registration.group.handle, operation.address, (c_size_t * 2)())

    def cancel_all(self) -> None:
        for group in self.groups:
            _NtCancelIoFileEx(group.handle, None, (c_size_t * 2)())

    def take(self, milliseconds: int, places: int) -> list[int]:
        """Wait for completions: their names, 0 for a wake-up. They are given again until they were `looked_at`."""
        if not self._count.value and not _GetQueuedCompletionStatusEx(
            self.handle, self._entries, places, byref(self._count), milliseconds, False
        ):
            error = ctypes.get_last_error()
            self._count.value = 0  # Wine counts one [seen]
            if error != _WAIT_TIMEOUT and not self._closing:
                raise ctypes.WinError(error)
            return []
        return self._entries[1 : 4 * self._count.value : 4]

    def looked_at(self) -> None:
        self._count.value = 0

    def post(self) -> None:
        _checked(_PostQueuedCompletionStatus(self.handle, 0, 0, None))

    def close(self) -> None:
        self._closing = True
        _ending[id(self)] = self.operations
        try:
            self.cancel_all()
            for name in self._entries[1 : 4 * self._count.value : 4]:
                self.operations.pop(name, None)
            # Not into the same memory: at the end of the process a daemon thread may still wait.
            entries, count = (c_size_t * (4 * _BATCH))(), c_ulong(0)
            deadline = time.monotonic() + _PATIENCE
            while self.operations and time.monotonic() < deadline:
                if _GetQueuedCompletionStatusEx(self.handle, entries, _BATCH, byref(count), 10, False):
                    for name in entries[1 : 4 * count.value : 4]:
                        self.operations.pop(name, None)
        finally:
            if not self.operations:
                del _ending[id(self)]
            for group in self.groups:
                _CloseHandle(group.handle)
            _CloseHandle(self.handle)


#: Operations of ports that are closed, until all have ended. Should the end of some not be told, their memory is given
#: up for lost, rather than given back too early.
_ending: dict[int, dict[int, _Operation]] = {}


class Backend(Facility):
    """Operations are begun and cancelled by the thread that waits: a change only notes what is new.

    So a wait under way does not see changes, and the poller interrupts it. Nothing here needs a lock: changes come
    under the poller's, and single operations on a dict are atomic.

    An exception (KeyboardInterrupt) may come between any two steps of `wait`. The next one then relies on nothing that
    was noted: all operations are cancelled, and all registrations looked at anew.
    """

    name = "afd"
    masks = _MASKS
    sees_changes = False
    lets_look = False
    wake_fd = -1  # no socket's

    __slots__ = (
        *("__weakref__", "_changed", "_close", "_closed", "_interrupted", "_open", "_port", "_posted"),
        *("_reported", "_sockets", "_vacant", "_woken"),
    )

    def __init__(self) -> None:
        self._open = False
        self._port = _Port()
        #: Also when the poller is forgotten, and at the end of the process: the kernel would write into freed memory.
        self._close = weakref.finalize(self, self._port.close)
        self._woken = False
        #: Whether the port was told of that: a wait under way notices.
        self._posted = False
        #: Number -> its registration.
        self._sockets: dict[int, _Registration] = {}
        self._interrupted = False
        # Three ordered sets of registrations: to be looked at before the next wait; the same, but after the others, so
        # that nobody's turn is taken by who had his; and those whose sockets are closed, which is told until `disarm`:
        # only the thread that waits knows the last.
        self._changed: dict[_Registration, None] = {}
        self._reported: dict[_Registration, None] = {}
        self._closed: dict[_Registration, None] = {}
        #: Those with room for more sockets; an ordered set.
        self._vacant: dict[_Group, None] = {}
        try:
            # Now, while no number of a closed socket can be this handle's: Wine crashes when that is polled [seen].
            self._open_group()
        except OSError:
            self._close()
            raise
        self._open = True

    def add(self, fd: int, mask: int) -> None:
        base = _base_handle(fd)
        self.remove(fd)  # of an earlier owner
        group = next(iter(self._vacant), None) or self._open_group()
        group.room -= 1
        if not group.room:
            del self._vacant[group]
        self._sockets[fd] = registration = _Registration(fd, base, mask, group)
        self._changed[registration] = None

    def modify(self, fd: int, mask: int) -> None:
        registration = self._sockets.get(fd)
        if registration is None or registration.closed:
            raise OSError(errno.EBADF, f"closed while it was registered: {fd}")
        _check_socket(fd)
        registration.wanted = mask
        self._changed[registration] = None

    def remove(self, fd: int) -> None:
        registration = self._sockets.get(fd)
        if registration is not None:
            registration.wanted = 0
            self._changed[registration] = None
            registration.group.room += 1
            self._vacant[registration.group] = None
            del self._sockets[fd]  # last: should an exception come before, it is watched for nothing, and still there

    def disarm(self, fd: int, mask: int) -> None:
        registration = self._sockets.get(fd)
        if registration is not None:
            registration.wanted = 0
            self._changed[registration] = None

    def wait(self, timeout: float | None, max_events: int) -> list[tuple[int, int]]:
        if self._interrupted:
            self._recover()
        self._interrupted = True  # unless it comes to its end
        self._take_hints()
        self._begin()
        found = {registration.fd: INVALID for registration in list(self._closed)[:max_events]}
        timeout = until_signals(timeout)
        milliseconds = _INFINITE if timeout is None else math.ceil(timeout * 1000)
        if found or self._woken:
            milliseconds = 0
        while (places := min(max_events - len(found), _BATCH)) > 0:
            names = self._port.take(milliseconds, places)
            self._look_at(names, found)
            if len(names) < places:
                break
            milliseconds = 0  # cancelled ones and wake-ups took the places: more may stand behind them
        events = list(found.items())
        if self._woken:
            events.append((self.wake_fd, READ))
        self._interrupted = False
        return events

    def wake(self) -> None:
        self._woken = True  # before the port is told: a wait may be quick
        if not self._posted:
            self._port.post()
            self._posted = True  # after it was: an exception may come between

    def drain(self) -> None:
        self._woken = self._posted = False

    def close(self) -> None:
        self._open = False
        self._close()

    def __del__(self) -> None:
        if self._open:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)

    # In the thread that waits

    def _recover(self) -> None:
        self._port.cancel_all()
        self._closed.clear()
        for registration in list(self._sockets.values()):
            registration.operation = None
            self._changed[registration] = None

    def _take_hints(self) -> None:
        """Whatever ended since the last wait begins anew. That a socket was closed is true for good."""
        places = _BATCH
        while self._port.operations and places == _BATCH:
            names = self._port.take(0, _BATCH)
            for name in names:
                operation = self._port.operations.get(name)
                if operation is not None:
                    registration = operation.registration
                    if not self._note_close(operation) and self._is_current(operation):
                        self._changed[registration] = None
                    self._port.end(operation)
            self._port.looked_at()
            places = len(names)

    def _look_at(self, names: list[int], found: dict[int, int]) -> None:
        """Add what has just happened to what was found."""
        for name in names:
            operation = self._port.operations.get(name)
            if operation is None:
                continue  # a wake-up
            registration = operation.registration
            if self._note_close(operation):
                found[registration.fd] = INVALID
            elif self._is_current(operation):
                status = operation.status & 0xFFFFFFFF
                if status == _CANCELLED:  # not by us, else it were current no more
                    bits = 0
                else:
                    bits = _BITS[operation.events & 0x1FF] if status == _SUCCESS else ERROR
                if bits:
                    found[registration.fd] = bits
                self._reported[registration] = None
            self._port.end(operation)
        self._port.looked_at()

    def _note_close(self, operation: _Operation) -> bool:
        """Whether it tells that a registered socket was closed: true for good, whichever of its operations tells it."""
        registration = operation.registration
        if not operation.says_closed() or self._sockets.get(registration.fd) is not registration:
            return False
        registration.closed = True
        self._changed[registration] = None  # where it is told from then on
        return True

    def _is_current(self, operation: _Operation) -> bool:
        """Whether it speaks for the registration that its number has now."""
        registration = operation.registration
        return registration.operation is operation and self._sockets.get(registration.fd) is registration

    def _begin(self) -> None:
        """Tell the kernel of all changes, and begin anew what has ended."""
        for some in (self._changed, self._reported):
            for registration in list(some):
                some.pop(registration, None)
                self._update(registration)

    def _update(self, registration: _Registration) -> None:
        operation, wanted = registration.operation, registration.wanted
        if operation is not None and operation.asked:
            if operation.asked == wanted and not registration.closed:
                return
            self._port.cancel(operation)
            operation = registration.operation = None
        if not wanted:
            self._closed.pop(registration, None)
            if self._sockets.get(registration.fd) is not registration:
                registration.operation = None  # the two refer to each other, and are done
            return
        if registration.closed:
            self._closed[registration] = None
            return
        if operation is None:
            operation = registration.operation = _Operation.of(registration)
        status = self._port.begin(operation, wanted)
        if status in _CLOSED:
            registration.closed = True
            self._closed[registration] = None
        elif status not in (_SUCCESS, _PENDING):
            raise _error(status)

    # Under the poller's lock

    def _open_group(self) -> _Group:
        group = self._port.open_group()
        self._vacant[group] = None
        registration = self._sockets.get(group.handle)
        if registration is not None:  # so the socket that had this number was closed, and must not be polled any more
            registration.closed = True
            self._changed[registration] = None
        return group


# The calls

_kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
_ntdll = ctypes.WinDLL("ntdll")
_ws2_32 = ctypes.WinDLL("ws2_32", use_last_error=True)

_INVALID_HANDLE = c_size_t(-1).value

_CreateIoCompletionPort = _kernel32.CreateIoCompletionPort
_CreateIoCompletionPort.argtypes = (c_void_p, c_void_p, c_size_t, c_ulong)
_CreateIoCompletionPort.restype = c_size_t
_PostQueuedCompletionStatus = _kernel32.PostQueuedCompletionStatus
_PostQueuedCompletionStatus.argtypes = (c_void_p, c_ulong, c_size_t, c_void_p)
_GetQueuedCompletionStatusEx = _kernel32.GetQueuedCompletionStatusEx
_GetQueuedCompletionStatusEx.argtypes = (c_void_p, c_void_p, c_ulong, c_void_p, c_ulong, c_int)
_SetFileCompletionNotificationModes = _kernel32.SetFileCompletionNotificationModes
_SetFileCompletionNotificationModes.argtypes = (c_void_p, c_ubyte)
_CloseHandle = _kernel32.CloseHandle
_CloseHandle.argtypes = (c_void_p,)
_NtDeviceIoControlFile = _ntdll.NtDeviceIoControlFile
_NtDeviceIoControlFile.argtypes = (*(c_void_p,) * 3, c_size_t, *(c_void_p, c_ulong) * 3)
_NtDeviceIoControlFile.restype = c_ulong
_NtCancelIoFileEx = _ntdll.NtCancelIoFileEx
_NtCancelIoFileEx.argtypes = (c_void_p, c_void_p, c_void_p)
_NtCreateFile = _ntdll.NtCreateFile
_NtCreateFile.argtypes = (c_void_p, c_ulong, *(c_void_p,) * 3, *(c_ulong,) * 4, c_void_p, c_ulong)
_NtCreateFile.restype = c_ulong
_RtlNtStatusToDosError = _ntdll.RtlNtStatusToDosError
_RtlNtStatusToDosError.argtypes = (c_ulong,)
_getsockopt = _ws2_32.getsockopt
_getsockopt.argtypes = (c_size_t, c_int, c_int, c_void_p, c_void_p)
_WSAIoctl = _ws2_32.WSAIoctl
_WSAIoctl.argtypes = (c_size_t, c_ulong, c_void_p, c_ulong, c_void_p, c_ulong, *(c_void_p,) * 3)


class _UnicodeString(ctypes.Structure):
    _fields_ = (("length", c_ushort), ("maximum", c_ushort), ("buffer", c_wchar_p))


class _ObjectAttributes(ctypes.Structure):
    _fields_ = (
        ("length", c_ulong),
        ("root", c_void_p),
        ("name", ctypes.POINTER(_UnicodeString)),
        ("attributes", c_ulong),
        ("security", c_void_p),
        ("quality", c_void_p),
    )


def _checked(result: int) -> int:
    """What a function of kernel32 returned. OSError, with its ``winerror``, where that means failure."""
    if not result:
        raise ctypes.WinError(ctypes.get_last_error())
    return result


def _error(status: int) -> OSError:
    """The OSError, with its ``winerror``, of an NTSTATUS."""
    return ctypes.WinError(_RtlNtStatusToDosError(status))


def _open_driver() -> int:
    """A handle to the driver. What follows ``\\Device\\Afd\\`` is any name."""
    text = "\\Device\\Afd\\muxio"
    name = _UnicodeString(2 * len(text), 2 * len(text), text)
    attributes = _ObjectAttributes(ctypes.sizeof(_ObjectAttributes), None, ctypes.pointer(name), 0, None, None)
    handle, block = c_size_t(), (c_size_t * 2)()
    synchronize, share_read_and_write, file_open = 0x00100000, 0x3, 1  # winnt.h
    status = _NtCreateFile(
        byref(handle), synchronize, byref(attributes), block, None, 0, share_read_and_write, file_open, 0, None, 0
    )
    if status != _SUCCESS:
        raise _error(status)
    return handle.value


def _check_socket(fd: int) -> None:
    """OSError: WSAENOTSOCK (10038) for what is closed or no socket."""
    answer, size = c_int(), c_int(ctypes.sizeof(c_int))
    if _getsockopt(fd, _SOL_SOCKET, _SO_TYPE, byref(answer), byref(size)):
        raise ctypes.WinError(ctypes.get_last_error())


def _ioctl(fd: int, code: int) -> int:
    """Ask Winsock for the handle below a socket. OSError: the code is unknown, or the socket."""
    answer, size = c_size_t(), c_ulong()
    if _WSAIoctl(fd, code, None, 0, byref(answer), ctypes.sizeof(answer), byref(size), None, None):
        raise ctypes.WinError(ctypes.get_last_error())
    return answer.value


def _base_handle(fd: int) -> int:
    """The socket that AFD knows. OSError: WSAENOTSOCK (10038) for what is closed or no socket."""
    _check_socket(fd)  # on Wine anything has a base handle [seen]
    return _lowest(fd, _ioctl)


def _lowest(fd: int, ioctl: Callable[[int, int], int]) -> int:
    """What is below a socket: itself, unless a layered provider stands between.

    A provider has to let SIO_BASE_HANDLE through, but some do not (Komodia's, which came with Superfish); those forget
    SIO_BSP_HANDLE_POLL, or SIO_BSP_HANDLE_SELECT, which lead one layer down (wepoll src/ws.c, mio#1314).
    """
    handle = fd
    while True:
        try:
            return ioctl(handle, _SIO_BASE_HANDLE)
        except OSError as error:
            if error.winerror == _WSAENOTSOCK:
                raise
            below = handle
            for code in (_SIO_BSP_HANDLE_POLL, _SIO_BSP_HANDLE_SELECT):
                try:
                    below = ioctl(handle, code)
                except OSError:
                    continue
                if below != handle:
                    break
            if below == handle:
                raise
            handle = below

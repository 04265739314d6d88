"""AFD, Windows: what its select() is made of, as operations that end at a completion port.

``\\Device\\Afd`` is the driver below Winsock. A handle to it takes IOCTL_AFD_POLL, an operation that ends as soon as one of
the events asked for holds for a socket, and then stands in the queue of the completion port that the handle belongs to.
None of this is documented by Microsoft, and all of it has been the same since Windows Vista: wepoll, libuv, mio, polling
and trio live on it. Where a fact is one of theirs, it says so here.

Four rules follow from how the driver behaves, and the rest of this file from them.

- One operation a socket: with two at a time, one may end for the events of the other (trio, "_io_windows.py"). So changes
  are collected, and what is new at the next wait is what the kernel is told.
- The memory of an operation is the kernel's until its completion was taken out of the queue, cancelled or not. So all
  that are under way stand in a table by their address, and nothing but a completion takes them out.
- An operation ends once: what holds for longer is seen by beginning another. That is level-triggered, and costs as much as
  is ready, not as is registered. What ended while nobody waited is no more than a hint, since it may have been read
  meanwhile: it begins anew before anything is said of it.
- Sockets are numbers that are used again. Each registration is an object of its own, and an operation belongs to that, not
  to the number: what an operation of an earlier owner comes to is thrown away.
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
from collections.abc import Callable
from ctypes import POINTER, byref, c_int, c_int64, c_size_t, c_ulong, c_ushort, c_void_p, c_wchar_p

from muxio.backends.facility import INVALID, Facility, until_signals
from muxio.events import ERROR, HANGUP, INTEREST, ONESHOT, PRIORITY, READ, READ_CLOSED, WRITE, combinations

#: AFD_POLL_*: the numbers of wepoll's src/afd.h.
_RECEIVE = 0x1
_RECEIVE_EXPEDITED = 0x2
_SEND = 0x4
_DISCONNECT = 0x8
_ABORT = 0x10
_LOCAL_CLOSE = 0x20
_ACCEPT = 0x80
_CONNECT_FAIL = 0x100

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

#: Sockets that share a handle to the driver. Cancelling an operation takes longer the more there are on its handle: with
#: 1,000 one begins to feel it (trio). wepoll and mio have 32 as well.
_GROUP = 32

#: Completions that one call takes out of the queue.
_BATCH = 1024

#: How many seconds `close` gives the kernel to return the memory of cancelled operations.
_PATIENCE = 5.0


def _mask(events: int) -> int:
    """What AFD is asked for. The close of the socket and errors are, always: they are reported without interest as well.

    DISCONNECT, the peer's end, goes with READ: for who does not read it would hold for ever.
    """
    mask = _LOCAL_CLOSE | _ABORT | _CONNECT_FAIL
    if events & READ:
        mask |= _RECEIVE | _ACCEPT | _DISCONNECT
    if events & WRITE:
        mask |= _SEND
    if events & PRIORITY:
        mask |= _RECEIVE_EXPEDITED
    return mask


_MASKS = {events: _mask(events) for events in combinations(INTEREST | ONESHOT)}


def _bits(events: int) -> int:
    """What AFD's events are called here.

    ABORT comes with a reset, but with two half-closes too, so it is a hang-up and not for sure an error (wepoll has it so).
    """
    bits = 0
    if events & (_RECEIVE | _ACCEPT):
        bits |= READ
    if events & _RECEIVE_EXPEDITED:
        bits |= PRIORITY
    if events & _SEND:
        bits |= WRITE
    if events & _DISCONNECT:
        bits |= READ | READ_CLOSED
    if events & _ABORT:
        bits |= HANGUP
    if events & _CONNECT_FAIL:
        bits |= WRITE | ERROR
    return bits


_BITS = [_bits(events) for events in range(_CONNECT_FAIL << 1)]


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
    timeout: int
    count: int
    handle: int
    events: int

    #: The registration that it belongs to, where it lies, and what it was begun for; 0 while it is not under way.
    registration: _Registration
    address: int
    asked: int


_INFO = _Operation.timeout.offset  # type: ignore[attr-defined]
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


class Backend(Facility):
    """All of AFD is called by the thread that waits: a change only notes what is new.

    So a wait under way does not see changes, and the poller interrupts it. Nothing here needs a lock: changes come under
    the poller's, and single operations on a dict are atomic.
    """

    name = "afd"
    masks = _MASKS
    sees_changes = False
    wake_fd = -1  # no socket's

    __slots__ = (
        "__weakref__",
        "_awake",
        "_changed",
        "_closed",
        "_entries",
        "_groups",
        "_operations",
        "_port",
        "_reported",
        "_sockets",
        "_taken",
        "_vacant",
        "_waiter",
    )

    def __init__(self) -> None:
        self._port: int | None = None
        self._awake = False
        #: Number -> its registration.
        self._sockets: dict[int, _Registration] = {}
        #: Address -> the operation that the kernel has there.
        self._operations: dict[int, _Operation] = {}
        # Three ordered sets of registrations: to be looked at before the next wait; the same, but after the others, so that
        # nobody's turn is taken by who had his; and those whose sockets are closed, which is still to be told.
        self._changed: dict[_Registration, None] = {}
        self._reported: dict[_Registration, None] = {}
        self._closed: dict[_Registration, None] = {}
        self._groups: list[_Group] = []
        self._vacant: dict[_Group, None] = {}
        self._waiter: dict[None, object] = {}
        #: OVERLAPPED_ENTRYs, four words each, of which the second is the address; and how many of them have been written
        #: and not yet been looked at. Should an exception strike just when the kernel has handed them out, they are
        #: still there.
        self._entries = (c_size_t * (4 * _BATCH))()
        self._taken = c_ulong(0)
        self._port = _checked(_CreateIoCompletionPort(_INVALID_HANDLE, None, 0, 0))
        try:
            self._open_group()
        except OSError:
            self.close()
            raise
        _kept.append(self._operations)

    def add(self, fd: int, mask: int) -> None:
        _check_socket(fd)
        base = _base_handle(fd)
        if fd in self._sockets:
            self.remove(fd)  # it is an earlier owner's
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
        registration = self._sockets.pop(fd, None)
        if registration is not None:
            registration.wanted = 0
            registration.group.room += 1
            self._vacant[registration.group] = None
            self._closed.pop(registration, None)
            self._changed[registration] = None

    def disarm(self, fd: int, mask: int) -> None:
        registration = self._sockets.get(fd)
        if registration is not None:
            registration.wanted = 0
            self._changed[registration] = None

    def wait(self, timeout: float | None, max_events: int) -> list[tuple[int, int]]:
        token = object()
        try:
            if self._waiter.setdefault(None, token) is not token:
                return []  # a look while another thread waits
            if self._operations:
                self._take_hints()
            self._begin()
            found: dict[int, int] = {}
            for registration in list(self._closed)[:max_events]:
                found[registration.fd] = INVALID
                self._closed.pop(registration, None)
            timeout = until_signals(timeout)
            milliseconds = _INFINITE if timeout is None else math.ceil(timeout * 1000)
            if found or self._awake:
                milliseconds = 0
            while (places := min(max_events - len(found), _BATCH)) > 0:
                addresses = self._dequeue(milliseconds, places)
                self._take(addresses, found)
                if len(addresses) < places:
                    break
                milliseconds = 0  # cancelled ones and wake-ups took the places: more may stand behind them
            events = list(found.items())
            if self._awake:
                events.append((self.wake_fd, READ))
            return events
        except BaseException:
            for registration in list(self._sockets.values()):  # who knows where it struck: look at all of them anew
                self._changed[registration] = None
            raise
        finally:
            if self._waiter.get(None) is token:
                del self._waiter[None]

    def wake(self) -> None:
        if not self._awake:
            self._awake = True
            _checked(_PostQueuedCompletionStatus(self._port, 0, 0, None))

    def drain(self) -> None:
        self._awake = False

    def close(self) -> None:
        port, self._port = self._port, None
        if port is None:
            return
        try:
            nothing = (c_size_t * 2)()
            for group in self._groups:
                _NtCancelIoFileEx(group.handle, None, nothing)
            deadline = time.monotonic() + _PATIENCE
            while self._operations and time.monotonic() < deadline:
                for address in self._dequeue(10, _BATCH, port):
                    self._operations.pop(address, None)
                self._taken.value = 0
        finally:
            for group in self._groups:
                _CloseHandle(group.handle)
            _CloseHandle(port)
            self._sockets.clear()
            if not self._operations:  # else the memory is given up for lost, rather than given back too early
                _kept[:] = [table for table in _kept if table is not self._operations]

    def __del__(self) -> None:
        if getattr(self, "_port", None) is not None:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            self.close()

    # In the thread that waits

    def _dequeue(self, milliseconds: int, places: int, port: int | None = None) -> list[int]:
        """The addresses of operations that have ended, 0 for a wake-up. They stay until `_taken` is reset."""
        if not self._taken.value and not _GetQueuedCompletionStatusEx(
            port or self._port, self._entries, places, byref(self._taken), milliseconds, False
        ):
            error = ctypes.get_last_error()
            self._taken.value = 0
            if error != _WAIT_TIMEOUT:
                raise ctypes.WinError(error)
            return []
        return self._entries[1 : 4 * self._taken.value : 4]

    def _take_hints(self) -> None:
        """Whatever ended since the last wait begins anew. That a socket was closed is true for good."""
        while addresses := self._dequeue(0, _BATCH):
            for address in addresses:
                operation = self._operations.get(address)
                if operation is not None:
                    registration = operation.registration
                    if self._is_current(operation):
                        registration.closed |= _says_closed(operation)
                        self._changed[registration] = None
                    self._end(operation)
            self._taken.value = 0
            if len(addresses) < _BATCH:
                break

    def _take(self, addresses: list[int], found: dict[int, int]) -> None:
        """Add what has just happened to what was found."""
        for address in addresses:
            operation = self._operations.get(address)
            if operation is None:
                continue
            if self._is_current(operation):
                registration = operation.registration
                status = operation.status & 0xFFFFFFFF
                if _says_closed(operation):
                    registration.closed = True
                    bits = INVALID
                elif status == _CANCELLED:  # not by us, else it were current no more
                    bits = 0
                else:
                    bits = _BITS[operation.events & 0x1FF] if status == _SUCCESS else ERROR
                if bits:
                    found[registration.fd] = bits
                if not bits & INVALID:
                    self._reported[registration] = None
            self._end(operation)
        self._taken.value = 0

    def _is_current(self, operation: _Operation) -> bool:
        """Whether it speaks for the registration that its number has now."""
        registration = operation.registration
        return registration.operation is operation and self._sockets.get(registration.fd) is registration

    def _end(self, operation: _Operation) -> None:
        operation.asked = 0
        self._operations.pop(operation.address, None)

    def _begin(self) -> None:
        """Tell the kernel of all changes, and begin anew what has ended."""
        for some in (self._changed, self._reported):
            for registration in list(some):
                some.pop(registration, None)
                self._update(registration)

    def _update(self, registration: _Registration) -> None:
        operation, wanted = registration.operation, registration.wanted
        if operation is not None and operation.asked:
            if operation.asked == wanted:
                return
            # It may have ended just now (STATUS_NOT_FOUND). Either way a completion returns its memory.
            _NtCancelIoFileEx(registration.group.handle, operation.address, (c_size_t * 2)())
            operation = registration.operation = None
        if not wanted:
            return
        if registration.closed:
            self._closed[registration] = None
            return
        if operation is None:
            operation = registration.operation = _Operation()
            operation.registration = registration
            operation.address = ctypes.addressof(operation)
        operation.timeout = _FOR_EVER
        operation.count = 1
        operation.handle = registration.base
        operation.events = operation.asked = wanted
        address = operation.address
        self._operations[address] = operation
        info = address + _INFO
        # It ends at the port in any case: also where the answer is that it has ended already.
        status = _NtDeviceIoControlFile(
            registration.group.handle, None, None, address, address, _IOCTL_AFD_POLL, info, _INFO_SIZE, info, _INFO_SIZE
        )
        if status in (_SUCCESS, _PENDING):
            return
        self._end(operation)
        if status not in _CLOSED:
            self._changed[registration] = None
            raise ctypes.WinError(_RtlNtStatusToDosError(status))
        registration.closed = True
        self._closed[registration] = None

    # Handles

    def _open_group(self) -> _Group:
        handle = _open_afd()
        if handle in self._sockets:  # so the socket that had this number was closed, and must not be polled any more
            registration = self._sockets[handle]
            registration.closed = True
            self._changed[registration] = None
        try:
            _checked(_CreateIoCompletionPort(handle, self._port, 0, 0))
        except OSError:
            _CloseHandle(handle)
            raise
        group = _Group(handle)
        self._groups.append(group)
        self._vacant[group] = None
        return group


#: The operations of every backend that is open, and of those that could not be closed in order: who forgets to close a
#: poller must not have the kernel write into freed memory.
_kept: list[dict[int, _Operation]] = []


def _says_closed(operation: _Operation) -> bool:
    return bool(operation.status & 0xFFFFFFFF == _SUCCESS and operation.events & _LOCAL_CLOSE)


# The calls

_kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
_ntdll = ctypes.WinDLL("ntdll")
_ws2_32 = ctypes.WinDLL("ws2_32", use_last_error=True)

_INVALID_HANDLE = c_size_t(-1).value

_CreateIoCompletionPort = _kernel32.CreateIoCompletionPort
_CreateIoCompletionPort.argtypes = [c_void_p, c_void_p, c_size_t, c_ulong]
_CreateIoCompletionPort.restype = c_size_t

_PostQueuedCompletionStatus = _kernel32.PostQueuedCompletionStatus
_PostQueuedCompletionStatus.argtypes = [c_void_p, c_ulong, c_size_t, c_void_p]
_PostQueuedCompletionStatus.restype = c_int

_GetQueuedCompletionStatusEx = _kernel32.GetQueuedCompletionStatusEx
_GetQueuedCompletionStatusEx.argtypes = [c_void_p, c_void_p, c_ulong, c_void_p, c_ulong, c_int]
_GetQueuedCompletionStatusEx.restype = c_int

_CloseHandle = _kernel32.CloseHandle
_CloseHandle.argtypes = [c_void_p]
_CloseHandle.restype = c_int

_NtDeviceIoControlFile = _ntdll.NtDeviceIoControlFile
_NtDeviceIoControlFile.argtypes = [
    c_void_p,
    c_void_p,
    c_void_p,
    c_void_p,
    c_void_p,
    c_ulong,
    c_void_p,
    c_ulong,
    c_void_p,
    c_ulong,
]
_NtDeviceIoControlFile.restype = c_ulong

_NtCancelIoFileEx = _ntdll.NtCancelIoFileEx
_NtCancelIoFileEx.argtypes = [c_void_p, c_void_p, c_void_p]
_NtCancelIoFileEx.restype = c_ulong

_NtCreateFile = _ntdll.NtCreateFile
_NtCreateFile.argtypes = [
    c_void_p,
    c_ulong,
    c_void_p,
    c_void_p,
    c_void_p,
    c_ulong,
    c_ulong,
    c_ulong,
    c_ulong,
    c_void_p,
    c_ulong,
]
_NtCreateFile.restype = c_ulong

_RtlNtStatusToDosError = _ntdll.RtlNtStatusToDosError
_RtlNtStatusToDosError.argtypes = [c_ulong]
_RtlNtStatusToDosError.restype = c_ulong

_getsockopt = _ws2_32.getsockopt
_getsockopt.argtypes = [c_size_t, c_int, c_int, c_void_p, c_void_p]
_getsockopt.restype = c_int

_WSAIoctl = _ws2_32.WSAIoctl
_WSAIoctl.argtypes = [c_size_t, c_ulong, c_void_p, c_ulong, c_void_p, c_ulong, c_void_p, c_void_p, c_void_p]
_WSAIoctl.restype = c_int


class _UnicodeString(ctypes.Structure):
    _fields_ = (("length", c_ushort), ("maximum", c_ushort), ("buffer", c_wchar_p))


class _ObjectAttributes(ctypes.Structure):
    _fields_ = (
        ("length", c_ulong),
        ("root", c_void_p),
        ("name", POINTER(_UnicodeString)),
        ("attributes", c_ulong),
        ("security", c_void_p),
        ("quality", c_void_p),
    )


def _checked(result: int) -> int:
    """What a function of kernel32 returned. OSError, with its ``winerror``, where that means failure."""
    if not result:
        raise ctypes.WinError(ctypes.get_last_error())
    return result


def _open_afd() -> int:
    """A handle to the driver. What follows ``\\Device\\Afd\\`` is any name."""
    name = "\\Device\\Afd\\muxio"
    text = _UnicodeString(2 * len(name), 2 * len(name), name)
    attributes = _ObjectAttributes(ctypes.sizeof(_ObjectAttributes), None, ctypes.pointer(text), 0, None, None)
    handle, status_block = c_size_t(), (c_size_t * 2)()
    synchronize, share_read_and_write, file_open = 0x00100000, 0x3, 1
    status = _NtCreateFile(
        byref(handle),
        synchronize,
        byref(attributes),
        status_block,
        None,
        0,
        share_read_and_write,
        file_open,
        0,
        None,
        0,
    )
    if status != _SUCCESS:
        raise ctypes.WinError(_RtlNtStatusToDosError(status))
    return handle.value


def _check_socket(fd: int) -> None:
    """OSError: WSAENOTSOCK (10038) for what is closed or no socket. (Wine has a base handle for anything.)"""
    answer, size = c_int(), c_int(ctypes.sizeof(c_int))
    if _getsockopt(fd, _SOL_SOCKET, _SO_TYPE, byref(answer), byref(size)):
        raise ctypes.WinError(ctypes.get_last_error())


def _ioctl(fd: int, code: int) -> int:
    """Ask Winsock for the handle below a socket. OSError: the code is unknown, or the socket."""
    answer, size = c_size_t(), c_ulong()
    if _WSAIoctl(fd, code, None, 0, byref(answer), ctypes.sizeof(answer), byref(size), None, None):
        raise ctypes.WinError(ctypes.get_last_error())
    return answer.value


def _base_handle(fd: int, ioctl: Callable[[int, int], int] = _ioctl) -> int:
    """The socket that AFD knows: `fd` itself, unless a layered provider stands between.

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
